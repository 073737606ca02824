"""Pushing to and loading from the Hub, over HTTP."""
