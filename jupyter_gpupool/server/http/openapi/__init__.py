"""The OpenAPI document that describes the HTTP calls."""
