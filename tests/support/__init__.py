"""What tests of several folders share: small models, adapters, processes, documents."""
