"""Edges: the Kubernetes API, the Ray dashboard, Events. They translate, and decide nothing."""
