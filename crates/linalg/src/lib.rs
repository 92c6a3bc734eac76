//! Covariance pooling and functions of batched symmetric positive semi-definite matrices, forward and adjoint.
