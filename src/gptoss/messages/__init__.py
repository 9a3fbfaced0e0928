"""Typed messages: commands, events, their envelope and their codec."""
