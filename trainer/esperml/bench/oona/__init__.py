"""How fast the bus is: publish, deliver, acknowledge, beside other brokers and beside a relay that stores nothing."""
