"""Engines that misbehave, each a module for the process backend to run."""
