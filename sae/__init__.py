"""The sparse autoencoder: model, codes, initialisation, metrics, and the files of other libraries."""
