"""Banks on the Hugging Face Hub: push, and pull with every hash checked before a bank appears."""
