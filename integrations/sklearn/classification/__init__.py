"""Classifiers that are made of means, counts and covariances of the classes, fitted over all sites."""
