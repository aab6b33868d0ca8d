"""Linear models of scikit-learn, fitted over all sites."""
