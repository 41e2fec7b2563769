"""What a diagnosis, a training, an evaluation and a whole recipe will cost, before anything is spent."""
