"""Inversion: images optimised pixel by pixel until a frozen classifier sees its classes and its statistics in them."""
