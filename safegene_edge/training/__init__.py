"""What needs torch (extra `train`): the prompts to learn from and the recipes that learn.

Nothing outside this package imports it, save the command line when asked to train.
"""
