"""Learning to rewrite queries with a retriever as the teacher: prompts, rewards, trainers and inference."""
