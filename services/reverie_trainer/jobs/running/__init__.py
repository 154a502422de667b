"""Driving jobs from state to state, and starting their workers."""
