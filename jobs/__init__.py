"""The trainer service: a queue of training jobs in object storage, and the processes that work it off."""
