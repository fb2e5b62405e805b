"""Hugging Face folders of trained models: written, loaded back and compared before they are called done."""
