"""What trains a base model, and its callbacks."""
