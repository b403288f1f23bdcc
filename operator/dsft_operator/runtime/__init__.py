"""What keeps the operator going: events in, a queue of keys, reconciliation, health."""
