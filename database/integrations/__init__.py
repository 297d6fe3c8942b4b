"""Adapters to agent frameworks; each module is imported only by its user."""
