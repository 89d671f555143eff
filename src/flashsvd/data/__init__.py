"""What is read: rows of labelled text, running text, the tasks they belong to, and which of it is taken."""
