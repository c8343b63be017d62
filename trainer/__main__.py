"""`python -m trainer CONFIG`: `winnow train` without the figures that need the subject model."""

from trainer.cli import make_app

if __name__ == "__main__":
    make_app()()
