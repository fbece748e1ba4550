"""The trainers: one file a method, each a loop that reads like the method in words."""
