"""An incident as one HTML file: what happened, why, and whether it happens again."""
