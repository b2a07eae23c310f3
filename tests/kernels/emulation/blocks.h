// Runs a kernel of stream.cu, one block after the other.
template <typename F>
void run_blocks(F kernel, const Args &args, int n) {
  for (int number = 0; number < n; number++) {
    Block block;
    block.number = number;
    block.size = n;
    block.shared.assign(sizeof(Shared) + 128, 85);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < WARPS * 32; thread++) {
      threads.emplace_back([&, thread] {
        std::deque<std::vector<Copy>> copies(1);
        own_block = &block;
        own_thread = thread;
        own_copies = &copies;
        kernel(args);
      });
    }
    for (std::thread &thread : threads) thread.join();
  }
}
extern "C" void run_shrink(const Args *args, int n) { run_blocks(shrink, *args, n); }
extern "C" void run_expand(const Args *args, int n) { run_blocks(expand, *args, n); }
