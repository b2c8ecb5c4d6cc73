"""Label sets: further labels of a bank's images or of stored views of them, without touching the images."""
