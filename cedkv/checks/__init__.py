"""Checks: does the cache pipeline hold on this model (Gate A, certificate), and does the prefix help (Gate B)?"""
