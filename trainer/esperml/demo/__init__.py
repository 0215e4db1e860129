"""The demo: two hosts with a bottleneck, trained as three twins each against a real server, and a report on it."""
