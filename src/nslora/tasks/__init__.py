"""What is asked and what is right: rules, rewards, worlds, problems, and the tasks made of them."""
