"""The engine on NATS JetStream: servers of the bus are gateways to a cluster that holds everything."""
