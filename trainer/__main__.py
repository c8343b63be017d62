"""`python -m winnow.trainer CONFIG`: `winnow train` without the figures that need the subject model."""

from winnow.cli.train import make_app

if __name__ == "__main__":
    make_app()()
