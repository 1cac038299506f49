"""What a model folder holds, before a weight is read: shapes, bytes by owner, and what measurement corrects."""
