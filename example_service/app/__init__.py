"""The service, floor by floor: domain, application, infrastructure, api."""
