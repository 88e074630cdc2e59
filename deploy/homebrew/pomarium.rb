# Pomarium as a command of Homebrew's, out of a git repository (docs/development.md, "Without a checkout"). Not run on a
# Mac yet: `ruby -c` is all that was.
#
# Only pomarium itself is installed here, which is pure Python. `pomarium setup` adds what it runs on, afterwards and as
# the user: Homebrew rewrites the library names in what a formula installs, and wheels such as PyTorch's leave no room
# for its longer ones.
class Pomarium < Formula
  include Language::Python::Virtualenv

  desc "LLM serving on a rack of Macs: vLLM's engine, Ray's scheduling, MLX workers"
  license "Apache-2.0"
  # Of Homebrew's environment only what begins with HOMEBREW_ reaches a formula.
  head ENV.fetch("HOMEBREW_POMARIUM_GIT", "file:///HOMEBREW_POMARIUM_GIT-is-not-set"), using: :git, branch: "main"

  depends_on arch: :arm64
  depends_on macos: :sequoia
  depends_on "python@3.13"

  def install
    environment = virtualenv_create(libexec, "python3.13", without_pip: false)
    environment.pip_install_and_link buildpath
  end

  def caveats
    <<~TEXT
      Once, and after each upgrade, for what pomarium runs on (0.75 GiB to download):
        pomarium setup
    TEXT
  end

  test do
    assert_match "install what pomarium runs on", shell_output("#{bin}/pomarium setup --help")
  end
end
