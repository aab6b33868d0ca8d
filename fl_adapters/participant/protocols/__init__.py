"""Protocols with several steps in a round: who answers the steps between the trainer's update and its next task."""
