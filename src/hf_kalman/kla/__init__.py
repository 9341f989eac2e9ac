"""Kalman Linear Attention configuration and models."""
