"""Scalers, encoders and other preprocessing of scikit-learn, fitted over all sites."""
