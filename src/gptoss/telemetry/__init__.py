"""Projections of the event journal, and the journal's embedded store."""
