"""What "equal" means: measures, bounds, where two models part and which known mistake explains it."""
