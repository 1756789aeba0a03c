"""Renderings of a Result. Nothing is computed here."""
