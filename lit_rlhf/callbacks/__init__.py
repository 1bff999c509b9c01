"""Callbacks: progress bar, export to Hugging Face format."""
