// The program of the iteration, as kernels take it that run all of it in one launch; see program.rs.
#pragma once

constexpr int MOST_STEPS = 32, MOST_REGISTERS = 48, MOST_DERIVED = 8;

// register = alpha * product + terms + diagonal * I
struct Out {
    double alpha, diagonal, weights[2];
    // Its slot, the register that keeps it in global memory or -1, the slots of the terms or -1.
    short slot, keep, terms[2];
};

struct Step {
    // Slots of the operands, -1 without a product; their registers, for the tangent.
    short left, right, left_value, right_value;
    short outs, unused[3];
    Out out[2];
};

// A register that is a sum of two kept ones.
struct Derived {
    short which, from[2], unused;
    double weights[2];
};

struct Fused {
    Step steps[MOST_STEPS];
    void *registers[MOST_REGISTERS];
    Derived derived[MOST_DERIVED];
    // Register 0 or the tangent's direction; the result, or null; the output of the layer, or null.
    const void *input;
    void *result, *output;
    const double *scale;
    long long image, output_image;
    int scale_image, n, row, stride;
    int count, derived_count, tangent, triangle;
    int input_slot, result_slot, buffer_slot;
    // Rows of a block, where several work on an image.
    int slab;
};
