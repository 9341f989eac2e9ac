"""Gated KalmaNet configuration and models."""
