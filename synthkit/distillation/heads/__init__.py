"""Networks that a loss trains or deploys beside the student. May import torch."""
