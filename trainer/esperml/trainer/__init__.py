"""Offline training of Tamiyo's policy from recorded experience.

``dataset`` reads recordings, ``transitions`` checks what they hold, ``replay`` keeps it, ``returns`` says what
decisions were worth, ``algorithm`` learns from that, ``metrics`` judges the result and ``training`` runs the whole.
Nothing is imported here, so that the command line starts without torch.
"""
