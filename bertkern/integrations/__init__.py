"""Drop-ins for other libraries. Import the module that is wanted: it registers itself."""
