"""Running a recording again: its decisions, its tokens, and what another policy would have done."""
