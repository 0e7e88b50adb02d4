"""A served model under mixed load for a long time: does it fail, leak, or drop requests when stopped?"""
