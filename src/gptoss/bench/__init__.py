"""Load tests: straight against the actors' mailboxes, or over HTTP, with an engine that only pretends."""
