"""The whole system under a clock, a scheduler and faults that a seed decides."""
