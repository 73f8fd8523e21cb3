"""What `train_demo.py` trains: one recipe per model, on the words of `work`."""
