"""The reference stack: real JupyterHub, Keycloak, Redis, Docker and the token broker.

Standard library only: deploy/stack runs it before anything is installed.
"""
