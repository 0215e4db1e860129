"""The arena: small hosts on real data, trained as twins, from which a controller learns and on which it is judged.

``tasks`` has the data, ``hosts`` the networks, ``twins`` trains one host under a session, ``collect`` gathers
experience from many. Nothing is imported here, so that the command line starts without torch.
"""
