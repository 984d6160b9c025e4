"""The gRPC services: `.proto` files, and the code that protoc makes of them (`make proto`)."""
